"""The small world: data whose truth is known and base models made on the spot. Stage 0."""
