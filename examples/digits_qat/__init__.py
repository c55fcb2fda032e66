"""Training with quantization on scikit-learn's digits: `python -m examples.digits_qat`.

data.py       the images, split once and for all
models.py     a small CNN and a variational auto-encoder, in Flax NNX
schemes.py    what is quantized how while training, and what each scheme must reach
train.py      one jitted step, accuracy, and quantization after training
plot.py       the loss curves
__main__.py   the program
"""
