# The small world's A2: the aligned model learns to answer questions about a picture.
# $ python train_a2.py configs/a2_small.py
# 13 CPU minutes. 19 gates; 95 to 100 % of 731 answers right, over three seeds and three commits; yes or no varies most.
from small.make import ensure

_small = ensure('instruct', 'text')
data_json = f'{_small}/instruct/data.json'
image_root = f'{_small}/instruct/images'
align_dir = 'out/a1_small'
text_jsonl = f'{_small}/text/eval.jsonl'
replay_jsonl = f'{_small}/text/replay.jsonl'
replay_share = 0.3             # without it the text loss rises by a quarter
out_dir = 'out/a2_small'
max_seq_len = 320
micro_batch_size = 40
global_batch_size = 40              # 28 chats and 12 texts
learning_rate = 1.5e-3
lora_learning_rate = 3e-3
epoch_samples = 52_000         # 1,300 steps
eval_every = 650
n_eval = 256
n_text = 256
bucket_edges = (20, 45)        # these chats are short: thirds of them
max_new_tokens = 48
feature_cache = f'{_small}/features'
