"""MobileNetV2 quantized with one call per scheme: `python -m examples.mobilenet`.

model.py       the network, in Flax NNX
torch_file.py  a state dict out of torch's old file format, without torch
load.py        weights out of that file, batch norms folded into the convolutions
images.py      sample images of scikit-image and scikit-learn
correct.py     what rounding does to means, taken back
evaluate.py    agreement with the float model, noise of its scores, bytes
schemes.py     what is quantized how, and what each scheme must reach
__main__.py    the program
"""
