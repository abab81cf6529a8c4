# The small world's A1: a 1.7 M Qwen3 that never saw a picture learns to caption, on two CPU cores.
# $ python train_a1.py configs/a1_small.py
from make_small import ensure

_small = ensure('captions', 'llm', 'vision')
data_json = f'{_small}/captions/data.json'
image_root = f'{_small}/captions/images'
llm = f'{_small}/llm'
vision = f'{_small}/vision'
out_dir = 'out/a1_small'
num_image_tokens = 16          # for 64 patches: 1 to 4, like 64 tokens for 256 patches; rows of 40 tokens, not 90
connector_width = 192
connector_heads = 6
max_seq_len = 128
batch_size = 64
rows_per_step = 64
learning_rate = 2e-3           # a connector of 1 M takes more than one of 82 M
epoch_samples = 38_400         # 600 steps; --epoch_samples=0 --epoch_minutes=2 measures instead
eval_every = 150
n_eval = 384
max_new_tokens = 48
feature_cache = f'{_small}/features'
