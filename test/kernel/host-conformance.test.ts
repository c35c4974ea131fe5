/** The suite of the fake host, on the kernel. */
import { afterAll } from 'vitest';
import { hostConformance } from '../support/host-conformance.ts';
import { createKernelHost, removeLinks } from '../support/kernel-host.ts';

afterAll(removeLinks);

hostConformance('the kernel', createKernelHost);
