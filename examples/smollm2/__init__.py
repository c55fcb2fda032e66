"""SmolLM2-135M quantized with one call per scheme: `python -m examples.smollm2`.

model.py      the network, in Flax NNX
load.py       weights and tokenizer out of a GGUF file
generate.py   greedy answers with a key-value cache
evaluate.py   perplexity and bytes
schemes.py    what is quantized how, and what each scheme must reach
__main__.py   the program
"""
