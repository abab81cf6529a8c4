"""A real example: emoji of five artists to a real language model, with their names."""
