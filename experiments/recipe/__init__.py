"""What a recipe would take: sizes of published models, memory and time by estimate."""
