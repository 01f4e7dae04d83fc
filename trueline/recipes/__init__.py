"""One function per stage, read top to bottom: open, build, loop, save."""
