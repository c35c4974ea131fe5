// Makes dist/: what `bin` names, the bundles of the drivers, the prebuilt addons beside them, and the library with types.
// The bundles run on bare Node: no node_modules, no loader.
import { execFileSync } from 'node:child_process';
import { chmodSync, copyFileSync, cpSync, mkdirSync, readFileSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const dist = join(root, 'dist');
const require = createRequire(import.meta.url);
const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'));

// Both packages look for their addon at run time relative to node_modules; the bundles have it beside them.
const addonsBeside = {
  name: 'addons-beside',
  setup(pluginBuild) {
    pluginBuild.onLoad({ filter: /koffi\/src\/koffi\/src\/static\.js$/ }, () => ({
      contents: "export function loadStatic() { return globalThis.kvmIbRequire('./koffi.node'); }",
    }));
    pluginBuild.onLoad({ filter: /netlink\/dist\/raw\.js$/ }, ({ path }) => {
      const source = readFileSync(path, 'utf8');
      const call = "require('node-gyp-build')(__dirname + '/..')";
      if (!source.includes(call)) throw new Error('netlink no longer loads its addon through node-gyp-build');
      return { contents: source.replace(call, "globalThis.kvmIbRequire('./netlink.node')") };
    });
  },
};

rmSync(dist, { recursive: true, force: true });
mkdirSync(dist);

const options = {
  outdir: dist,
  outExtension: { '.js': '.mjs' },
  bundle: true,
  platform: 'node',
  format: 'esm',
  target: 'node20',
  minifySyntax: true,
  minifyWhitespace: true,
  legalComments: 'none',
  define: { KVM_IB_VERSION: JSON.stringify(version) },
  banner: {
    js: "import{createRequire as kvmIbCreateRequire}from'node:module';const require=kvmIbCreateRequire(import.meta.url);globalThis.kvmIbRequire=require;",
  },
  plugins: [addonsBeside],
  logLevel: 'warning',
};

await build({
  ...options,
  entryPoints: { 'kvm-ib': join(root, 'lib/cli/main.ts'), engine: join(root, 'lib/driver/engine-main.ts') },
});
// OpenNebula copies both parsers to every host: short names make it a quarter smaller. Functions keep theirs for stack traces.
await build({
  ...options,
  entryPoints: { parser: join(root, 'lib/driver/parser-main.ts'), vnm: join(root, 'lib/driver/vnm-main.ts') },
  minifyIdentifiers: true,
  keepNames: true,
});
chmodSync(join(dist, 'kvm-ib.mjs'), 0o755);

const arch = process.arch;
const koffi = dirname(require.resolve(`@koromix/koffi-linux-${arch}/package.json`));
copyFileSync(join(koffi, `linux_${arch}`, 'koffi.node'), join(dist, 'koffi.node'));
const netlink = dirname(require.resolve('netlink/package.json'));
copyFileSync(join(netlink, 'prebuilds', `linux-${arch}`, 'node.napi.node'), join(dist, 'netlink.node'));

execFileSync(
  process.execPath,
  [join(root, 'node_modules/typescript/bin/tsc'), '-p', join(root, 'tsconfig.build.json')],
  {
    stdio: 'inherit',
  },
);
cpSync(join(root, 'lib/nftables-json/README.md'), join(dist, 'lib/nftables-json/README.md'), { force: true });
