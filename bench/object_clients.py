"""Slow clients of /s3, and the latency of /health meanwhile."""

import asyncio

import health

STEP_BYTES = 4096
STEP_SECONDS = 0.05
PROMISED_BYTES = 1 << 30
KEY = "object"


def waits(port: int, clients: int, seconds: float) -> health.Waits:
    """Half of the clients send a body, half read an object, 80 KiB a second each."""
    return asyncio.run(_waits(port, clients, seconds))


async def _waits(port: int, clients: int, seconds: float) -> health.Waits:
    slow = [asyncio.ensure_future((_sends if number % 2 else _reads)(port, number)) for number in range(clients)]
    await asyncio.sleep(1)
    taken = await health.waits(port, seconds)
    for each in slow:
        if each.done():
            each.result()
        each.cancel()
    await asyncio.gather(*slow, return_exceptions=True)
    return taken


async def _sends(port: int, number: int) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /s3/upload?key=slow/{number} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {PROMISED_BYTES}\r\n\r\n"
    try:
        writer.write(head.encode())
        while True:
            writer.write(bytes(STEP_BYTES))
            await writer.drain()
            await asyncio.sleep(STEP_SECONDS)
    finally:
        writer.close()


async def _reads(port: int, _: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=STEP_BYTES)
    try:
        writer.write(f"GET /s3/download?key={KEY} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        while True:
            await reader.readexactly(STEP_BYTES)
            await asyncio.sleep(STEP_SECONDS)
    finally:
        writer.close()
