"""What the device computes before the model runs: one second of sound -> log-mel energies."""

import numpy as np

RATE = 16000  # samples a second
WINDOW, HOP = 400, 320  # 25 ms, every 20 ms
FRAMES, BANDS = 49, 32
LOW, HIGH = 80.0, 7600.0  # Hz
FLOOR = -80.0  # dB below the loudest frame and band


def mel(hertz: np.ndarray) -> np.ndarray:
    """Hertz on the mel scale."""
    return 2595 * np.log10(1 + np.asarray(hertz) / 700)


def filters() -> np.ndarray:
    """Triangles of equal width on the mel scale, (WINDOW // 2 + 1, BANDS)."""
    places = mel(np.fft.rfftfreq(WINDOW, 1 / RATE))[:, None]
    edges = np.linspace(mel(LOW), mel(HIGH), BANDS + 2)
    rise = (places - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - places) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rise, fall))


def log_mel(sound: np.ndarray) -> np.ndarray:
    """(RATE,) float sound -> (FRAMES, BANDS) float32, -1 (silence) to 1 (the loudest)."""
    starts = HOP * np.arange(FRAMES)
    frames = sound[starts[:, None] + np.arange(WINDOW)[None]] * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2 @ filters()
    level = 10 * np.log10(power + 1e-10)
    level = np.maximum(level - level.max(), FLOOR)
    return (1 - 2 * level / FLOOR).astype(np.float32)
