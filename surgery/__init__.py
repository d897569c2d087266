"""Model surgery: what did fine-tuning change in this model, and how do I change it myself?"""

__version__ = "0.1.0"
