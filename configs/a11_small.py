# Six short A1 runs of the small world, a twelfth as long as a1_small, at high learning rates for a small connector.
# $ python sweep_a11.py configs/a11_small.py
# 3 CPU minutes. The runs at 1.5e-3 pass the bars of a beginning, with luck those at 3e-3; those at 6e-3 do not look.
base_config = 'configs/a1_small.py'
out_dir = 'out/a11_small'
grid = {'learning_rate': [1.5e-3, 3e-3, 6e-3], 'vision_ln': [False, True]}
overrides = {
    'epoch_samples': 6400,
    'eval_every': 100,
    'n_eval': 192,
    'n_golden': 12,
    'n_predictions': 64,
    # bars of a beginning: it has to look, and not yet to see everything or to write well
    'gate_share_removed': 0.1,
    'gate_input_recall': 0.3,
    'gate_output_recall': 0.2,
    'gate_ablation_nats': 0.1,
    'gate_malformed': 0.8,
    'gate_own_truth': 0.02,
}
