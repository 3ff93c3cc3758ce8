"""What the papers print: their numbers as data, and how measured ones compare."""
