# Freezes the board's client into firmware. In the board's own manifest.py:
#     include("path/to/this/repository/micropython/manifest.py")
package("twin_device", base_path=".", opt=3)
package(
    "twin_device",
    (
        "core/__init__.py",
        "core/credentials.py",
        "core/errors.py",
        "core/patch.py",
        "core/settings.py",
        "core/stream.py",
        "core/topics.py",
        "core/twin.py",
    ),
    base_path="..",
    opt=3,
)
