# New rows for Qwen3-8B: gradient and AdamW state for 32,772 rows twice, not for 2 x 185 k rows of 4,096.
# $ torchrun --standalone --nproc_per_node=8 train_b3.py configs/b3_qwen3_8b.py
# Costs 64.1 GiB of GPU memory by formula.
# Not run: there was no GPU.
shards_dir = 'out/b2_qwen3_8b'
llm = 'Qwen/Qwen3-8B'
image_codec = 'deepseek-community/Janus-Pro-1B'
image_prefix = 'model.vqmodel.'
audio_codec = 'kyutai/mimi'
text_jsonl = 'data/heldout_text.jsonl'   # a few hundred plain texts of your own choice: what must not change
out_dir = 'out/b3_qwen3_8b'
task_weights = {'i2t': 4.0, 'a2t': 1.0, 't2i': 4.0, 't2a': 1.0}   # 3.8 k clips: a fifth of the examples, not half
micro_batch_size = 8
