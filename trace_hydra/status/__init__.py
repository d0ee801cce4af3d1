"""How a run or a sweep stands, from its files alone; no torch here."""
