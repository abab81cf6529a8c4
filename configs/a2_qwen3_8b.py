# Visual instruction tuning on LLaVA-Instruct-150K: the connector goes on learning, LoRA r 16 joins it.
# $ torchrun --standalone --nproc_per_node=8 train_a2.py configs/a2_qwen3_8b.py
# Costs 54.3 GiB of GPU memory by formula for examples of 1,024 tokens.
# Not run: there was no GPU.
data_json = 'data/LLaVA-Instruct/llava_instruct_150k.json'
image_root = 'data/LLaVA-Instruct/train2017'
align_dir = 'out/a1_qwen3_8b'
text_jsonl = 'data/heldout_text.jsonl'   # a few hundred plain texts of your own choice: what must not get worse
out_dir = 'out/a2_qwen3_8b'
max_bad_samples = 100
micro_batch_size = 4
workers = 8
