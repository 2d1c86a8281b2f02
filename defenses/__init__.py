"""One file per defense; the registry finds them, nobody imports them by name."""
