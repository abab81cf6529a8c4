# Real pictures to a real language model: emoji of five artists, captioned by SmolLM2-135M, on two CPU cores.
# $ python train_a1.py configs/a1_emoji.py
# $ python train_a1.py configs/a1_emoji.py --llm=FOLDER    # where no hub can be reached
# 42 CPU minutes (AMD EPYC, Zen 5). 18 gates passed: 0.65 of the loss removed, the picture found among 32 in 0.69.
# The noun is right in 23 % of pictures by an artist who was held out (docs/results.md).
data_json = 'data/emoji/captions.json'     # of python -m emoji.pictures
image_root = 'data/emoji'
llm = 'HuggingFaceTB/SmolLM2-135M-Instruct'
vision = 'data/emoji/vision'               # of python -m emoji.tower
out_dir = 'out/a1_emoji'
num_image_tokens = 16
connector_width = 384
connector_heads = 6
max_seq_len = 96
micro_batch_size = 32
global_batch_size = 32
learning_rate = 1e-3
epoch_samples = 40_000                     # 1,250 steps, six times through
n_eval = 256
max_new_tokens = 24
feature_cache = 'data/emoji/features'
