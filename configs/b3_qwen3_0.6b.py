# New rows for the smallest Qwen3: 33.6 M numbers in each of the two matrices, 32,772 rows of 1,024.
# $ python train_b3.py configs/b3_qwen3_0.6b.py
# Costs 26.3 GiB of GPU memory by formula; micro_batch_size = 8 takes 14.5.
# Not run: there was no GPU.
shards_dir = 'out/b2_qwen3_0.6b'
llm = 'Qwen/Qwen3-0.6B'
image_codec = 'deepseek-community/Janus-Pro-1B'
image_prefix = 'model.vqmodel.'
audio_codec = 'kyutai/mimi'
text_jsonl = 'data/heldout_text.jsonl'   # a few hundred plain texts of your own choice: what must not change
out_dir = 'out/b3_qwen3_0.6b'
task_weights = {'i2t': 4.0, 'a2t': 1.0, 't2i': 4.0, 't2a': 1.0}   # 3.8 k clips: a fifth of the examples, not half
micro_batch_size = 16
