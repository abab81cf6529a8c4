# Shards of LLaVA-Pretrain (558 k pictures) and Clotho (3.8 k sounds with five captions each) for Qwen3-8B.
# $ torchrun --standalone --nproc_per_node=8 build_b2.py configs/b2_qwen3_8b.py
# Cost: not measured: both codecs run over everything once.
# Not run: there was no GPU.
data_json = 'data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json'
image_root = 'data/LLaVA-Pretrain/images'
sound_dir = 'data/Clotho/development'
sound_captions = 'data/Clotho/clotho_captions_development.csv'
audit_dir = 'out/b1_qwen3_8b'
llm = 'Qwen/Qwen3-8B'
image_codec = 'deepseek-community/Janus-Pro-1B'
image_prefix = 'model.vqmodel.'
audio_codec = 'kyutai/mimi'
out_dir = 'out/b2_qwen3_8b'
max_bad_samples = 500
max_seq_len = 2048
workers = 8
