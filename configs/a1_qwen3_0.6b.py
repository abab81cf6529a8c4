# A1 with the smallest Qwen3: 64 image tokens, a connector of 13.2 M.
# $ python train_a1.py configs/a1_qwen3_0.6b.py
# Costs 8.3 GiB of GPU memory by formula: a 24 GB card.
# Not run: there was no GPU.
data_json = 'data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json'
image_root = 'data/LLaVA-Pretrain/images'
llm = 'Qwen/Qwen3-0.6B'
vision = 'google/siglip2-so400m-patch14-384'
out_dir = 'out/a1_qwen3_0.6b'
max_bad_samples = 500
micro_batch_size = 32
workers = 8
