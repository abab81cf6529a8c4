# The stability sweep: six A1 runs of 1,000 steps on the same held-out items.
# $ python sweep_a11.py configs/a11_qwen3_0.6b.py
# Cost: six times a1_qwen3_0.6b for 1,000 steps each.
# Not run: there was no GPU.
base_config = 'configs/a1_qwen3_0.6b.py'
out_dir = 'out/a11_qwen3_0.6b'
overrides = {
    'epoch_samples': 256_000,
    'eval_every': 250,
    # bars of a beginning: it has to look, and not yet to see everything or to write well
    'gate_share_removed': 0.1,
    'gate_input_recall': 0.3,
    'gate_output_recall': 0.2,
    'gate_malformed': 0.5,
    'gate_own_truth': 0.02,
}
nproc_per_node = 1
