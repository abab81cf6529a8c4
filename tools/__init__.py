"""What nobody needs in order to train: export, the report page, memory by formula, benchmarks."""
