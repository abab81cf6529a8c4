# A1 at the reference's sizes: SigLIP2 so400m at 384 pixels (729 patches), 64 image tokens, a connector of 82.4 M.
# $ torchrun --standalone --nproc_per_node=8 train_a1.py configs/a1_qwen3_8b.py
# Costs 23.2 GiB of GPU memory by formula, 16.0 of them frozen weights in bf16.
# Not run: there was no GPU.
data_json = 'data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json'
image_root = 'data/LLaVA-Pretrain/images'
llm = 'Qwen/Qwen3-8B'
vision = 'google/siglip2-so400m-patch14-384'
out_dir = 'out/a1_qwen3_8b'
max_bad_samples = 500
micro_batch_size = 8
workers = 8
