# The stability sweep: six A1 runs of 1000 steps on the same held-out items.
# $ python sweep_a11.py configs/a11_qwen3_8b.py
# Not run yet: there was no GPU.
base_config = 'configs/a1_qwen3_8b.py'
out_dir = 'out/a11_qwen3_8b'
overrides = {'epoch_samples': 256_000, 'eval_every': 250}
nproc_per_node = 8
