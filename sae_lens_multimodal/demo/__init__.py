"""The whole line on the embedded model: train, harvest, explain, score, steer, report."""
