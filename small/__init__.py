"""The small world, stage 0: data whose truth is known, base models made on the spot, and runs judged by that truth."""
