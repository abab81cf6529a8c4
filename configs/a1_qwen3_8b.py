# A1 at the reference's sizes: Qwen3-8B, SigLIP2 so400m at 384 pixels (729 patches), 64 image tokens, 82.4 M connector.
# $ torchrun --standalone --nproc_per_node=8 train_a1.py configs/a1_qwen3_8b.py
# Memory, by formula: 16.4 GB for the frozen LLM in bf16 and 0.9 GB for the tower, 1.3 GB for the connector with its
# AdamW state; activations on top. Not run yet: there was no GPU.
data_json = 'data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json'
image_root = 'data/LLaVA-Pretrain/images'
llm = 'Qwen/Qwen3-8B'
vision = 'google/siglip2-so400m-patch14-384'
out_dir = 'out/a1_qwen3_8b'
max_bad_samples = 500
micro_batch_size = 8
workers = 8
