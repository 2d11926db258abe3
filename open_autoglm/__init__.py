"""Open-AutoGLM: the fastest way to serve a language model on your own hardware, with evidence."""

import logging

# transformers imports torchao wherever it is installed, and two warnings follow that concern nobody here: of
# torchao's GPU libraries, which no CPU build of torch can load, and of the way it registers its enums.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
