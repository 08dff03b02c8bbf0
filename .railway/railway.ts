// Railway, Infrastructure as Code: `railway config plan`, then `railway config apply`. See docs/deploy/railway.md.
// Put your own fork into `github(...)`. Values marked preserve() are set once by hand and kept.
import { bucket, defineRailway, github, postgres, preserve, project, service, volume } from "railway/iac";

export default defineRailway(() => {
  const database = postgres("postgres");
  // choose both regions near your InfluxDB; a bucket cannot be moved later
  const data = volume("headwater-data", { region: "europe-west4", sizeMB: 1024 });
  const objects = bucket("headwater-objects", { region: "iad" });

  const headwater = service("headwater", {
    source: github("owner/headwater", { branch: "main" }),
    healthcheck: "/health",
    healthcheckTimeout: 120,
    replicas: 1, // a service with a volume cannot have more
    volumeMounts: { "/data": data },
    env: {
      API_KEYS: preserve(), // required: the address is public
      CHECKPOINT_DATABASE_URL: database.env.DATABASE_URL,
      INFLUXDB_URL: preserve(),
      INFLUXDB_TOKEN: preserve(),
      INFLUXDB_ORG: preserve(),
      INFLUXDB_BUCKET: preserve(),
      S3_BUCKET: preserve(),
      S3_ENDPOINT_URL: preserve(),
      S3_REGION: "auto",
      S3_ADDRESSING_STYLE: "virtual",
      S3_ACCESS_KEY_ID: preserve(),
      S3_SECRET_ACCESS_KEY: preserve(),
      RAILWAY_RUN_UID: "0", // a volume belongs to root
      RAILWAY_DEPLOYMENT_DRAINING_SECONDS: "30", // above SHUTDOWN_GRACE_SECONDS, which is 25
    },
  });

  return project("headwater", { resources: [database, data, objects, headwater] });
});
