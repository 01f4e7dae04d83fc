"""Every knob, and nothing that computes: no torch here."""
