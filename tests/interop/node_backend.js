// Microsoft's service SDK for Node against the local hub. Argument: the service connection string.
// NODE_EXTRA_CA_CERTS names the CA. Each line on standard output tells what the SDK saw.
'use strict';
const { Client, JobClient, Registry } = require('azure-iothub');

const SOON = 20; // seconds
const KEY = 'MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=';
const keys = { type: 'sas', symmetricKey: { primaryKey: KEY, secondaryKey: KEY } };

const tell = (what, value = null) => console.log(JSON.stringify([what, value]));
const refused = (what, work) => work.then(() => tell(what, 'accepted'), (error) => tell(what, error.name));
const desired = (members) => ({ properties: { desired: members } });

async function names(registry) {
  return (await registry.list()).responseBody.map((one) => one.deviceId).sort();
}

async function playIdentities(registry, text) {
  // Without keys the SDK sends empty ones: the hub has to make them.
  const made = (await registry.create({ deviceId: 'sensor-0' })).responseBody;
  tell('made', Buffer.from(made.authentication.symmetricKey.primaryKey, 'base64').length >= 32);
  const created = (await registry.create({ deviceId: 'sensor-1', authentication: keys })).responseBody;
  tell('created', [created.deviceId, created.status, created.authentication.symmetricKey.primaryKey]);
  await refused('created twice', registry.create({ deviceId: 'sensor-1' }));
  await refused('unknown', registry.get('nobody'));
  await refused('bad name', registry.create({ deviceId: 'a b' }));
  const other = text.replace(/SharedAccessKey=.*/, 'SharedAccessKey=' + KEY);
  await refused('other key', Registry.fromConnectionString(other).get('sensor-1'));
  await registry.update({ deviceId: 'sensor-0', status: 'disabled' });
  tell('disabled', (await registry.get('sensor-0')).responseBody.status);
  tell('statistics', (await registry.getRegistryStatistics()).responseBody.disabledDeviceCount);
  await registry.delete('sensor-0');
  const two = [{ deviceId: 'sensor-2', authentication: keys }, { deviceId: 'sensor-3' }];
  tell('bulk', (await registry.addDevices(two)).responseBody);
  await refused('bulk again', registry.addDevices(two));
  await registry.updateDevices([{ deviceId: 'sensor-3', status: 'disabled' }], true);
  tell('bulk updated', (await registry.get('sensor-3')).responseBody.status);
  await registry.removeDevices([{ deviceId: 'sensor-3' }], true);
  tell('devices', await names(registry));
}

async function playTwins(registry) {
  const twin = (await registry.getTwin('sensor-1')).responseBody;
  tell('new twin', [twin.etag, twin.version, twin.properties.desired.$version]);
  await twin.update(desired({ interval: 15, limits: { high: 30 } }));
  tell('updated', [twin.properties.desired.interval, twin.properties.desired.$version]);
  await refused('stale', registry.updateTwin('sensor-1', desired({ interval: 16 }), 'AAAAAAAAAAE='));
  const forced = await registry.updateTwin('sensor-1', desired({ limits: { high: null, low: 5 } }), '*');
  tell('forced', forced.responseBody.properties.desired.limits);
  await registry.updateTwin('sensor-2', desired({ old: 1 }), '*');
  const emptied = (await registry.updateTwin('sensor-2', desired(null), '*')).responseBody.properties.desired;
  tell('emptied', [emptied.old ?? null, emptied.$version]);
  await refused('invalid', registry.updateTwin('sensor-1', desired({ 'bad key': 1 }), '*'));
  await registry.addModule({ deviceId: 'sensor-1', moduleId: 'm' });
  tell('modules', (await registry.getModulesOnDevice('sensor-1')).responseBody.map((one) => one.moduleId));
  await registry.updateModuleTwin('sensor-1', 'm', desired({ interval: 1 }), '*');
  const module = (await registry.getModuleTwin('sensor-1', 'm')).responseBody;
  tell('module twin', module.properties.desired.interval);
  await registry.removeModule('sensor-1', 'm');
  await refused('removed', registry.getModule('sensor-1', 'm'));
}

async function playQueries(registry) {
  const query = registry.createQuery('SELECT * FROM devices', 1);
  const pages = [];
  while (query.hasMoreResults) {
    pages.push((await query.nextAsTwin()).result.map((twin) => twin.deviceId));
  }
  tell('pages', pages);
  const chosen = 'SELECT deviceId AS id FROM devices WHERE properties.desired.interval = 15';
  tell('query', (await registry.createQuery(chosen).next()).result);
  await refused('no query', registry.createQuery('SELECT FROM').next());
}

// The job once it is over.
async function over(jobs, id) {
  const deadline = Date.now() + SOON * 1000;
  for (;;) {
    const { jobStatus } = await jobs.getJob(id);
    if (!['scheduled', 'queued', 'running'].includes(jobStatus.status)) return jobStatus;
    if (Date.now() > deadline) throw new Error(jobStatus.status);
  }
}

async function playMethodsAndJobs(registry, jobs, text) {
  const client = Client.fromConnectionString(text);
  const reboot = { methodName: 'reboot', payload: { delay: 5 } };
  await refused('not online', client.invokeDeviceMethod('sensor-2', reboot));
  // The test is a device that answers two of them.
  tell('methods', 2);
  const patient = { ...reboot, connectTimeoutInSeconds: SOON, responseTimeoutInSeconds: SOON };
  tell('answer', (await client.invokeDeviceMethod('sensor-1', patient)).result);
  const all = "deviceId = 'sensor-1'";
  const made = await jobs.scheduleDeviceMethod('reboot', all, reboot, null, SOON);
  const rebooted = await over(jobs, 'reboot');
  tell('job', [made.jobStatus.status, rebooted.status, rebooted.deviceJobStatistics.succeededCount]);
  const update = { etag: '*', ...desired({ interval: 60 }) };
  await jobs.scheduleTwinUpdate('twins', '*', update, new Date(), SOON);
  const updated = await over(jobs, 'twins');
  tell('twin job', [updated.status, updated.deviceJobStatistics.succeededCount]);
  tell('twin', (await registry.getTwin('sensor-2')).responseBody.properties.desired.interval);
  const tomorrow = new Date(Date.now() + 86400 * 1000);
  const later = await jobs.scheduleTwinUpdate('later', '*', update, tomorrow, SOON);
  tell('scheduled', later.jobStatus.status);
  await jobs.cancelJob('later');
  tell('cancelled', (await jobs.getJob('later')).jobStatus.status);
  const listed = await jobs.createQuery('scheduleUpdateTwin', 'completed').next();
  tell('jobs', listed.result.map((job) => job.jobId));
}

async function main() {
  const text = process.argv[2];
  const registry = Registry.fromConnectionString(text);
  await playIdentities(registry, text);
  await playTwins(registry);
  await playQueries(registry);
  await playMethodsAndJobs(registry, JobClient.fromConnectionString(text), text);
  // The SDK keeps its connections alive, and Node with them.
  process.exit(0);
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
