"""To and from other programs: layouts, files, pipelines, schedulers."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # diffusers opens it where it is there; it has much to say
