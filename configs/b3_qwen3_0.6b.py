# The smallest Qwen3, one card: 12 M numbers in each matrix of new rows at 1,024 wide.
# $ python train_b3.py configs/b3_qwen3_0.6b.py
# Not run yet.
shards_dir = 'out/b2_qwen3_0.6b'
llm = 'Qwen/Qwen3-0.6B'
image_codec = 'deepseek-community/Janus-Pro-1B'
image_prefix = 'model.vqmodel.'
audio_codec = 'kyutai/mimi'
text_jsonl = 'data/heldout_text.jsonl'   # a few hundred plain texts of your own choice: what must not change
out_dir = 'out/b3_qwen3_0.6b'
micro_batch_size = 16
