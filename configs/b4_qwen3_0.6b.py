# B4 with the smallest Qwen3: LoRA r 64 on its layers, and the new rows go on learning.
# $ python train_b4.py configs/b4_qwen3_0.6b.py
# Costs 41.5 GiB of GPU memory by formula; micro_batch_size = 4 takes 12.9.
# Not run: there was no GPU.
shards_dir = 'out/b2_qwen3_0.6b'
new_rows_dir = 'out/b3_qwen3_0.6b'
image_codec = 'deepseek-community/Janus-Pro-1B'
image_prefix = 'model.vqmodel.'
audio_codec = 'kyutai/mimi'
text_jsonl = 'data/heldout_text.jsonl'   # a few hundred plain texts of your own choice: what must not get worse
replay_jsonl = 'data/replay_text.jsonl'  # plain text of the same kind, other texts: what keeps it so
out_dir = 'out/b4_qwen3_0.6b'
lora_r = 64                    # to emit a new modality takes more than to answer about one
lora_alpha = 64
task_weights_start = {'i2t': 4.0, 'a2t': 1.0, 't2i': 2.0, 't2a': 0.5}   # B3 knows reading best: writing grows
task_weights = {'i2t': 2.0, 'a2t': 0.5, 't2i': 4.0, 't2a': 1.0}         # 3.8 k clips: a fifth of the examples
guidance = (3.0, 1.0)          # as images are commonly drawn; the second shows what it is worth
micro_batch_size = 16
