"""The configuration side of ``task=anemoi``: a configuration of anemoi-training, composed, checked and translated."""
