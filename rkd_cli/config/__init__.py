"""Files and recipes under the flags."""
