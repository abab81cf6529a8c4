# The small world's A1: a Qwen3 of 0.9 M that never saw a picture learns to caption, on a CPU core.
# $ python train_a1.py configs/a1_small.py
# 4 CPU minutes and 8 for the base models (AMD EPYC, Zen 5). 18 gates; 0.13 nats per label with the right picture, 2.88
# with another; captions name 97.4 to 99.96 % of the attributes right, over three seeds and three commits.
from small.make import ensure

_small = ensure('captions', 'llm', 'vision')
data_json = f'{_small}/captions/data.json'
image_root = f'{_small}/captions/images'
llm = f'{_small}/llm'
vision = f'{_small}/vision'
out_dir = 'out/a1_small'
num_image_tokens = 32          # eight a patch: an earlier LLM learned half as fast with 16, hardly with 8
connector_width = 192
connector_heads = 6
max_seq_len = 128
micro_batch_size = 64
global_batch_size = 64
learning_rate = 3e-3           # a connector of 1 M takes more than one of 82 M
epoch_samples = 76_800         # 1,200 steps; --epoch_samples=0 --epoch_minutes=2 measures instead
eval_every = 300
gate_ablation_nats = 0.5       # a picture that is worth less than this has not been looked at
n_eval = 384
bucket_edges = (10, 20)        # label tokens of a short and of a medium caption, at most
max_new_tokens = 48
feature_cache = f'{_small}/features'
