"""Found by pytest first, so that every test file below can ``import oracles``."""
