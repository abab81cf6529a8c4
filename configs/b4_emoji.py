# SmolLM2-135M learns to draw emoji and to say their names, and goes on naming what it sees and hears: LoRA.
# $ python train_b4.py configs/b4_emoji.py
# Not run: by the cost of its steps 5 CPU hours, half of that by the clock on two free cores.
shards_dir = 'out/b2_emoji'
new_rows_dir = 'out/b3_emoji'
image_codec = 'data/emoji/image_codec'
audio_codec = 'data/emoji/audio_codec'
text_jsonl = 'data/emoji/text.jsonl'
replay_jsonl = 'data/emoji/replay.jsonl'
replay_share = 0.1
out_dir = 'out/b4_emoji'
lora_r = 32
lora_alpha = 32
lora_dropout = 0.0
task_weights = {'i2t': 1.0, 'a2t': 1.0, 't2i': 2.0, 't2a': 1.0}
max_seq_len = 256
micro_batch_size = 16
global_batch_size = 32
learning_rate = 3e-3
lora_learning_rate = 1e-3
epoch_samples = 96_000         # 3,000 steps
eval_every = 1000
n_eval = 256
n_golden_between = 8
n_predictions = 64
n_retrieval = 32
n_text = 64
max_new_tokens = 16
temperature = 0.7
guidance = (1.5,)
log_every = 25
