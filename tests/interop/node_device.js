// Microsoft's device SDK for Node against the local hub. Arguments: the connection strings of a device and of
// a module. NODE_EXTRA_CA_CERTS names the CA. Each line on standard output tells what the SDK saw.
'use strict';
const { Client, Message, ModuleClient } = require('azure-iot-device');
const { Mqtt } = require('azure-iot-device-mqtt');

const tell = (what, value = null) => console.log(JSON.stringify([what, value]));

async function play(client, onMethod, name) {
  await client.open();
  const twin = await client.getTwin();
  tell(`${name} twin`, twin.properties);
  const report = (patch) => new Promise((done, failed) =>
    twin.properties.reported.update(patch, (error) => (error ? failed(error) : done())));
  // A listener is given the whole document, too; only patches carry null.
  const patchWith = (key) => new Promise((done) =>
    twin.on('properties.desired', (patch) => key in patch && done(patch)));
  const first = patchWith('first');
  const second = patchWith('second');
  await report({ battery: 55, nested: { a: 1 } });
  await report({ nested: { a: null } });
  await twin.get();
  tell(`${name} reported`, twin.properties.reported);
  tell(`${name} ready`);
  tell(`${name} patch`, await first);
  // This SDK ignores the answer's status; the error is made of its body, in the hub's words.
  await report({ 'bad key': 1 }).catch((error) => tell(`${name} refused`, /bad key/.test(error.message)));
  // The test ends the connection; the SDK makes another one by itself.
  tell(`${name} again`, await second);
  await report({ battery: 54 });
  const asked = new Promise((done, failed) => onMethod.call(client, 'reboot', (request, response) => {
    tell(`${name} asked`, [request.methodName, request.payload]);
    response.send(202, { seconds: request.payload.delay }, (error) => (error ? failed(error) : done()));
  }));
  tell(`${name} listens`);
  await asked;
  await client.sendEvent(new Message('hello'));
  await client.close();
  tell(`${name} over`);
}

async function main() {
  const [device, module] = process.argv.slice(2);
  await play(Client.fromConnectionString(device, Mqtt), Client.prototype.onDeviceMethod, 'device');
  await play(ModuleClient.fromConnectionString(module, Mqtt), ModuleClient.prototype.onMethod, 'module');
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
