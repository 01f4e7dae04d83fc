"""What the peers' trainers tell of every step. Apart from `sides.py`: transformers takes memory, which is measured."""

import time

from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Seconds and loss of every step."""

    def __init__(self) -> None:
        self.began, self.seconds, self.losses = 0.0, [], []

    def on_step_begin(self, args, state, control, **more):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **more):
        self.seconds.append(time.perf_counter() - self.began)

    def on_log(self, args, state, control, logs=None, **more):
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
