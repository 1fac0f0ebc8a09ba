"""The model cache: base models as folders of config, safetensors and tokenizer, with facts and digests.

`python -m adaptermesh.worker.models pull NAME` fills it; the worker loads a base model only from here.
"""
