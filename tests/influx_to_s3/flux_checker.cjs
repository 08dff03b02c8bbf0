// Reads a JSON string with a Flux text per line, writes `true` or `false` per line: InfluxData's own semantic check.
const { is_valid_flux } = require(process.argv[2]);
require("readline")
  .createInterface({ input: process.stdin })
  .on("line", (line) => process.stdout.write(`${is_valid_flux(JSON.parse(line))}\n`));
