"""boto3's own ways, one per process: `object_ways.py up|down|splice ENDPOINT BUCKET FILE OFFSET`."""

import sys

import boto3
from botocore.config import Config


def main() -> None:
    """The upload and the download of the SDK at their defaults; a patch as one does it without part copies."""
    way, endpoint, bucket, path, offset = sys.argv[1:]
    config = Config(
        s3={"addressing_style": "path"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", config=config)
    if way == "up":
        client.upload_file(path, bucket, "boto3")
    elif way == "down":
        client.download_file(bucket, "boto3", f"{path}.boto3")
    else:
        data = bytearray(client.get_object(Bucket=bucket, Key="boto3")["Body"].read())
        data[int(offset)] = ord("x")
        client.put_object(Bucket=bucket, Key="boto3", Body=bytes(data))


main()
