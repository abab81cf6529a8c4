# Visual instruction tuning on LLaVA-Instruct-150K: the connector goes on learning, LoRA r 16 joins it.
# $ python train_a2.py configs/a2_qwen3_0.6b.py
# Costs 37.9 GiB of GPU memory by formula for examples of 1,024 tokens; micro_batch_size = 4 takes 11.4.
# Not run: there was no GPU.
data_json = 'data/LLaVA-Instruct/llava_instruct_150k.json'
image_root = 'data/LLaVA-Instruct/train2017'
align_dir = 'out/a1_qwen3_0.6b'
text_jsonl = 'data/heldout_text.jsonl'   # a few hundred plain texts of your own choice: what must not get worse
out_dir = 'out/a2_qwen3_0.6b'
max_bad_samples = 100
micro_batch_size = 16
workers = 8
