"""`make frozen`: writes what the structure tests compare with. Read the difference before you commit it: others rely on these names."""

from tests.structure.surface import PAGE, SURFACE, surface
from trueline.config.describe import reference_page

if __name__ == "__main__":
    SURFACE.write_text(surface(), encoding="utf-8")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(reference_page(), encoding="utf-8")
