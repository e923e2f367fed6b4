"""Make data.npz: words spoken by espeak-ng, in noise, as log-mel energies: `python speak.py`.

Needs Debian's espeak-ng; seeded. Training, calibration and evaluation share no voice, and what
they say beside the ten words differs: the evaluation set is of speakers that nobody has heard.
"""

import io
import subprocess
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from features import BANDS, FRAMES, RATE, log_mel

DATA = Path(__file__).with_name("data.npz")
WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
OTHER = len(WORDS)  # the label of every other word, and of noise alone
ACCENTS = ("en", "en-US", "en-GB-scotland", "en-GB-x-rp", "en-GB-x-gbcwmd", "en-029")
VOICES = {
    "train": "m1 m2 m3 m4 f1 f2 Alex Andy Annie belinda linda david Michael antonio Gene",
    "calibration": "m5 f3 Andrea Lee paul steph2",
    "evaluation": "m6 m7 m8 f4 f5 Denis Alicia Marco anika benjamin steph victor",
}
OTHERS = {
    "train": (
        "bed bird cat dog eight five four happy house three seven wow sheila learn water open "
        "close light dark music play pause call mother window door green red black white over "
        "under long short night day hello thanks please turn walk run sleep paper coffee name "
        "time people school number street garden winter summer know note lift rate dawn ton"
    ),
    "calibration": "nine six visual tree carpet sugar phone",
    "evaluation": "two zero marvin follow forward backward one moon river table",
}
COUNTS = {"train": 140, "calibration": 12, "evaluation": 50}  # of each word, and of the others
MORE = {"train": 3, "calibration": 1, "evaluation": 1}  # times as many others: they differ more


def spoken(word: str, accent: str, voice: str, random: np.random.Generator) -> np.ndarray:
    """A word as sound at RATE, at a random speed and pitch."""
    speed, pitch = random.integers(130, 231), random.integers(25, 76)
    words = ["espeak-ng", "-v", f"gmw/{accent}+{voice}", "-s", str(speed), "-p", str(pitch)]
    made = subprocess.run([*words, "--stdout", word], capture_output=True, check=True).stdout
    with wave.open(io.BytesIO(made)) as file:
        rate = file.getframerate()
        sound = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 2**15
    heard = np.flatnonzero(np.abs(sound) > 0.01)
    sound = sound[heard[0] : heard[-1] + 1]
    steps = np.arange(int(len(sound) * RATE / rate)) * rate / RATE
    return np.interp(steps, np.arange(len(sound)), sound)


def noise(random: np.random.Generator) -> np.ndarray:
    """A second of noise: its power falls with the frequency, by a random slope; some hum."""
    frequencies = np.maximum(np.fft.rfftfreq(RATE, 1 / RATE), 20)
    phases = np.exp(2j * np.pi * random.random(len(frequencies)))
    sound = np.fft.irfft(phases * frequencies ** -random.uniform(0, 1.2), RATE)
    hum = np.sin(2 * np.pi * random.uniform(45, 240) * np.arange(RATE) / RATE)
    sound = sound / sound.std() + random.choice([0, 0, 1]) * random.uniform(0.2, 1) * hum
    return sound / sound.std()


def scene(word: np.ndarray | None, random: np.random.Generator) -> np.ndarray:
    """One second with the word somewhere in it, 3 to 30 dB above the noise."""
    behind = noise(random)
    if word is None:
        return behind
    word = word[:RATE]
    start = random.integers(0, RATE - len(word) + 1)
    sound = np.zeros(RATE)
    sound[start : start + len(word)] = word / word.std()
    return sound + behind * 10 ** (-random.uniform(3, 30) / 20)


def clips(part: str, random: np.random.Generator) -> Iterator[tuple[np.ndarray, int]]:
    """Sounds and labels of a part of the data, class by class."""
    voices, others = VOICES[part].split(), OTHERS[part].split()
    for label in range(OTHER + 1):
        for count in range(COUNTS[part] * (MORE[part] if label == OTHER else 1)):
            accent = ACCENTS[random.integers(len(ACCENTS))]
            voice = voices[count % len(voices)]
            word = WORDS[label] if label < OTHER else others[count % len(others)]
            alone = label == OTHER and count % 5 == 0
            yield scene(None if alone else spoken(word, accent, voice, random), random), label


def main() -> None:
    stored = {}
    for seed, part in enumerate(COUNTS):
        random = np.random.default_rng(seed)
        sounds, labels = zip(*clips(part, random), strict=True)
        energies = np.array([log_mel(sound) for sound in sounds])
        order = random.permutation(len(labels))
        # 64 steps of 1.3 dB: finer than the noise, and a third smaller than whole bytes.
        stored[f"{part}_features"] = np.round((energies[order] + 1) * 31.5).astype(np.uint8)
        if part != "calibration":
            stored[f"{part}_labels"] = np.array(labels, np.uint8)[order]
        assert stored[f"{part}_features"].shape[1:] == (FRAMES, BANDS)
    np.savez_compressed(DATA, **stored)
    print(f"{DATA.name}: {DATA.stat().st_size} bytes")


if __name__ == "__main__":
    main()
