"""ICC profiles made for a test: plain gamma curves, or the smallest table of inks."""

import struct

D50 = (0.9642, 1.0, 0.8249)
# Colorants of Display P3 and of sRGB, adapted to D50 (their primaries, by Bradford's matrix).
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def rgb_profile(colorants=P3, curve=SRGB_CURVE) -> bytes:
    red, green, blue = colorants
    tags = {b"rXYZ": _xyz(red), b"gXYZ": _xyz(green), b"bXYZ": _xyz(blue)}
    return _profile(
        b"RGB ", b"XYZ ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _para(curve))
    )


def grey_profile(gamma: float) -> bytes:
    return _profile(
        b"GRAY", b"XYZ ", {b"kTRC": b"curv" + struct.pack(">4xIH2x", 1, int(gamma * 256))}
    )


def ink_profile() -> bytes:
    """CMYK whose magenta prints as white does: a table of 2 x 2 x 2 x 2 colors in Lab."""
    table = b"".join(
        bytes([255 if not (cyan or yellow or black) else 64 if black else 150, 128, 128])
        for cyan in (0, 1)
        for _magenta in (0, 1)
        for yellow in (0, 1)
        for black in (0, 1)
    )
    one = [65536 if i % 4 == 0 else 0 for i in range(9)]
    ramp = bytes(range(256))
    lut = b"mft1" + struct.pack(">4xBBBx9i", 4, 3, 2, *one) + ramp * 4 + table + ramp * 3
    return _profile(b"CMYK", b"Lab ", {b"A2B0": lut}, kind=b"prtr")


def _xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))


def _para(values) -> bytes:
    return (
        b"para"
        + struct.pack(">4xHH", 3, 0)
        + struct.pack(">5i", *(round(v * 65536) for v in values))
    )


def _profile(space: bytes, connection: bytes, tags: dict[bytes, bytes], kind=b"mntr") -> bytes:
    tags = {b"wtpt": _xyz(D50), **tags}
    head, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        head += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I4xI", start + len(body), 0x02400000) + kind + space + connection
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", *(round(v * 65536) for v in D50))
    return header.ljust(128, b"\0") + head + body
